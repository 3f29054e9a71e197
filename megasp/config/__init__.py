"""What a run is made of, and the flags that say it. `load(argv)` reads them; `validate` refuses what cannot work."""
