"""Tests of what goes into other people's trainers."""
