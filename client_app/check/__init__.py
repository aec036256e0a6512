"""Everything a node needs, looked at before it joins."""
