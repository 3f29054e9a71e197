"""Pipeline parallelism: a schedule is data; the same lists run, simulate and draw."""
