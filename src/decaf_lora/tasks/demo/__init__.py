"""The demo task: its model, its data, and how both are joined."""
