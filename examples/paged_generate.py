"""Run transformers' own generate() on pages. Outside the `with` block the model is as before."""

from granite_paged import PagedConfig, load, paged

loaded = load()  # the embedded checkpoint; yours: load("ibm-granite/granite-4.0-h-1b")
prompt = "<bos> <plain> red-fox copper-bell and green-wolf iron-boat while red-fox <ask>"
inputs = loaded.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)

with paged(loaded.model, PagedConfig(page_size=16)):
    tokens = loaded.model.generate(**inputs, max_new_tokens=1)
print(loaded.tokenizer.decode(tokens[0, -1]))
