"""Problems to train on and to be tested on: generated (`micro`), from files (`files`), or of a user's own module.

`task.name="module:function"` names a function of (TaskConfig, *, seed, needed) that returns a `types.Task`: `needed` is how
many training problems the run draws, for generators; fewer are gone through again. Limits on evaluation sets
(`eval_problems`) are for the function to keep.
"""
