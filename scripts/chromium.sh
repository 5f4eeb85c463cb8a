#!/bin/sh
# The browser tests drive the system's Chromium. Install it where that is allowed; else they are skipped, loudly.
for name in "$SEMEME_CHROMIUM" chromium chromium-browser google-chrome; do
    [ -n "$name" ] && command -v "$name" >/dev/null 2>&1 && exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "Installing Chromium for the browser tests ..."
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } \
        >/tmp/sememe-chromium.log 2>&1 && exit 0
    tail -n 3 /tmp/sememe-chromium.log
fi
echo "******** No Chromium: the browser tests will be SKIPPED. Install it: apt-get install chromium ********"
exit 0
