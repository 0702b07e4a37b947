"""Rival methods, each written from its paper, on the same frozen features, episodes and budget as ours.

What each keeps of its paper and what it had to give up is said in its module.
"""
