"""Tests of what a plan says of a run besides its ε: that single laws hold, each by a p-value.

law_test       the result of one test
noise          each step's, each coordinate's and each cell's noise; noise that repeats
sampling       how often, and with how many others, records were drawn
composition    the ε of a plan, composed apart from the accountants
"""
