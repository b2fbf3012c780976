"""Rows of prompts and answers, or of chats: where they are stored, and the conversation in one."""
