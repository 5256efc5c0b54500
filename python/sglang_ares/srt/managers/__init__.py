"""Processes and their messages: controller, worker scheduler, tokenizer manager."""
