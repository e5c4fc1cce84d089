"""Pages to look at: one HTML file each on runs, on comparisons and on measurements, which fetches
nothing.
"""
