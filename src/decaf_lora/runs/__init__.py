"""Runs on disk: from a configuration to a finished folder, one run or several, stopped and resumed."""
