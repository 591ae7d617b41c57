"""A whole swarm in virtual time: the daemons' own code around a network and stage processes that are played."""
