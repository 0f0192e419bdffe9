"""Low memory: one component is loaded at a time, weights stay in their files, and decoding goes by tiles."""

from edge_sd import Pipeline, Request

with Pipeline.open("emoji", low_memory=True, preference="memory") as pipeline:
    result = pipeline.generate(Request("a mushroom, cartoon style", seed=2))

result.save("low_memory.png")
print(result.plan)
