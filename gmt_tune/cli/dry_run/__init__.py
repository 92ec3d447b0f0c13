"""What ``gmt-tune try`` runs: a config on the CPU, with a small model of the same family in place of the real one."""
