"""Populations: members that train alone and exchange a little.

What `wash`, `sparta`, `papa`, `dart` and `ensemble` have in common.
"""
