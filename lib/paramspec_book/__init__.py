"""The website: chapters are run, figures drawn, and pages told what they rest on.

It imports everything; nothing imports it but the command line.
"""
