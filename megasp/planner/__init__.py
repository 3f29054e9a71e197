"""The planner: which parallel layout trains a model fastest on given GPUs, before any of them is rented.

hardware.py what a GPU and its links do (`gpus/*.yaml`), rates.py seconds of one operation, job.py what a rank does in a
step, layer_time.py and step_time.py the time of a layer and a step, search.py every legal combination, report.py and
page.py what a person reads, launch.py the script that starts it.
"""
