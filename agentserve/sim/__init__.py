"""Simulation of agent serving: programs of turns and tool gaps on a virtual clock, and what is measured of them."""
