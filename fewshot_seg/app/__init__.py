"""The page of ``fewshot-seg app``: mark an object in example photos, and see it found in others.

`Session` is all that the page does, without any page; `page` builds it with gradio, `serving` listens.
"""
