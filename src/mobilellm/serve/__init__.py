"""The HTTP server behind `mobilellm serve`: OpenAI's interface over the runtime's continuous batch.

app.py           the routes, and what lives as long as the server
protocol.py      what a request may say; its schema is in the OpenAPI document
prepared.py      a request as prompts and settings of the runtime
answering.py     the way into the batch and back: slots, queue
drawing.py       between logits and tokens: bias, grammar (grammar.py), how likely a token was
choices.py       tokens as OpenAI's objects, whole and in chunks
exchange.py      one request's life: body in, answer out, the client watched
security.py      who may ask: host, origin, key
server.py        uvicorn, patient within limits
"""
