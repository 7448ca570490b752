"""A rule, or a plan to be matched, and what it looks at -> a resolved plan with its companion.

Whatever is needed, images or gradients, is looked at here, once. The plan holds which entries
were chosen, so that applying it needs neither.
"""
