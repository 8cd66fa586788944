"""The command line: parse, call the library, render, exit code. One file a command.

To add a command, write one file here and add one line to `nvfp4check.cli.table.COMMANDS`.
`nvfp4check.cli.command` says what the file holds.
"""
