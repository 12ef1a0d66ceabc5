"""Decode orders as data: a plan says what is fed, seen and decided in every forward pass."""
