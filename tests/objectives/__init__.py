"""Objectives as functions of the log-odds."""
