"""The command `stillhouse`. Nothing imports this room."""
