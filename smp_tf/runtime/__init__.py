"""Runs programs: the session of this process, and what a step becomes on one rank."""
