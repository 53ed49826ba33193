"""Does a sender's cache help a receiver that has read the same prompt itself, and what else would explain it?"""
