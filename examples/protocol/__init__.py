"""The claims of the paper, tested with ten seeds, paired arms and counterfactuals: ``python -m examples.protocol``.

:mod:`.settings` states tasks, arms and the contrasts that are named in advance; :mod:`.tasks` draws clips and trains a
seed's backbone; :mod:`.branches` trains an arm behind it and measures what it came to; :mod:`.runs` does so one run at
a time, a file a run, and goes on where it stopped; :mod:`.analysis` compares arms seed by seed, and :mod:`.report`
writes what follows.
"""
