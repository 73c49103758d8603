"`make lab` reads this file and nothing user-wide: every save is cleaned as `nbdev_clean` would."
from nbdev.clean import clean_jupyter

c.ContentsManager.pre_save_hook = clean_jupyter  # noqa: F821 (jupyter defines c)
