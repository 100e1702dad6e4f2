"""A package beside Stillhouse: an engine, a source and a divergence of a user's own, which configs
name as `own_parts.module:name`."""
