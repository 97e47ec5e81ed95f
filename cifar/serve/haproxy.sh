#!/bin/sh
# HAProxy for Ray Serve, with its status pages and admin socket for this user alone: Ray's template opens the pages on
# all interfaces. A client has 10 s for the headers of a request: connections are bounded, and many that send nothing
# would stop the others. Called as haproxy is; CIFAR_HAPROXY is the real one.
previous=
for argument in "$@"; do
    if [ "$previous" = -f ] && [ -f "$argument" ]; then
        sed -i -e 's/^    bind :/    bind 127.0.0.1:/' -e 's/^  bind \*:/  bind 127.0.0.1:/' \
            -e 's/^    timeout client .*/&\n    timeout http-request 10s/' \
            -e 's/ mode 666 level admin/ mode 600 level admin/' "$argument"
    fi
    previous=$argument
done
exec "$CIFAR_HAPROXY" "$@"
