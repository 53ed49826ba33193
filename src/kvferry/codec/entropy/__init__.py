"""Entropy coding with frozen tables: no table travels, so a message of one token can be coded as well as a long one."""
