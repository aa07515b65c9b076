"""Speed and memory of whole models."""
