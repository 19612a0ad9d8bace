#!/bin/sh
echo "hello from $TASK_ID"
