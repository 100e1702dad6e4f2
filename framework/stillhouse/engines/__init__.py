"""Teacher engines: each turns work items into records, and describes what targets it can make."""
