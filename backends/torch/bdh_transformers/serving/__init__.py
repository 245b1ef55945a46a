"""OpenAI's completions from one model and one batch that texts join and leave at any step: python -m bdh_transformers.serving

It knows no passwords, and listens on its own machine alone unless told otherwise: what faces a network belongs behind a proxy
that asks for them. Needs the extra ``serve``.
"""
