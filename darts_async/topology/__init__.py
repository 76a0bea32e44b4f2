"""Who runs, who talks to whom, and where a run keeps what: the one place for each of these names.

`roles` and `links` are the tables, `outcomes` says what becomes of a sample, `run_files` names the files of a run, and
`plan` is a run as it is resolved from these and the settings. The gate refuses a literal of such a name elsewhere.
"""
