"""Rows of prompts and answers, or of chats: their files, and the conversation in each."""
