"""Answer several prompts at once. A refused prompt fails alone, and its answer says why."""

from granite_paged import Engine, PagedConfig, SamplingParams, load

loaded = load()
facts = "<bos> <plain> red-fox copper-bell and green-wolf iron-boat while"
prompts = [f"{facts} red-fox <ask>", f"{facts} green-wolf <ask>", ""]
sizes = PagedConfig(page_size=16, max_tokens=1024, max_sequences=8)

with Engine(loaded.model, sizes, tokenizer=loaded.tokenizer) as engine:
    answers = engine.generate(prompts, SamplingParams(max_new_tokens=1))
for answer in answers:
    print(f"refused: {answer.error}" if answer.error else answer.text)
