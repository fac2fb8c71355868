"""Recipes that tests break, and the names in their errors."""

TIES = """
models: [{model: m1, parameters: {weight: 1}}, {model: m2, parameters: {weight: 1}}]
merge_method: ties
base_model: m0
"""


LINEAR = "models: [{model: m0}, {model: m2}]\nmerge_method: linear\nparameters: {weight: 1}\n"
