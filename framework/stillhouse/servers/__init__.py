"""Models behind servers with OpenAI's routes: how they are asked, what that may cost, and what was
bought.

client     requests, their price, and patience
ledger     money that all processes share
answers    what was paid for, until it is published
access     all of these for one folder of a store
served     the model that answers first, to which all answers are held
desk       many requests at one time
chat       what a chat completion or a completion says
logprobs   and the log-probabilities that come with it
"""
