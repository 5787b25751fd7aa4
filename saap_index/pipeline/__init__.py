"""From a model and texts to trained routers: loading, capture, training layer by layer, measurement. Needs transformers."""
