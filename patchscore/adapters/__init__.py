"""patchscore's denoisers under other people's samplers: each adapter turns one convention into z and sigma."""
