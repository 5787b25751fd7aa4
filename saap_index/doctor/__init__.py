"""``saap doctor``: whether the library works here, and what it is worth on a model, its routers and a text.."""
