"""Prints the path of the plugin file."""

from merit_fast.integrations.swift import PLUGIN_FILE

print(PLUGIN_FILE)
