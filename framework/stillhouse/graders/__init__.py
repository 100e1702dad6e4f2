"""Graders: how good is what a model wrote, as a score from 0 to 1 for each sample.

base                        Sample, Grader, Failure, and `graded`, which no grader can bring down
choice                      the grader of a section [[graders]], and what its verdicts are named by
exact, number, maths,
json_schema, python, judge  the kinds; a function of the user's own is one more
processes, child            graders in processes that have limits
sandbox, cgroups            the sandbox of code that a model wrote; inside.py runs in it
"""

from stillhouse.graders.base import Failure as Failure
from stillhouse.graders.base import Graded as Graded
from stillhouse.graders.base import Grader as Grader
from stillhouse.graders.base import Sample as Sample
from stillhouse.graders.base import graded as graded
from stillhouse.graders.choice import make_grader as make_grader
from stillhouse.graders.identity import identity_of as identity_of
