"""Engines: what runs a teacher. Each turns work items into records, and says of itself what it can
do."""
