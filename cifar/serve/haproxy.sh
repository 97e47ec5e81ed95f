#!/bin/sh
# HAProxy for Ray Serve, with its status pages and admin socket for this user alone: Ray's template opens the pages on
# all interfaces. Called as haproxy is; CIFAR_HAPROXY is the real one.
previous=
for argument in "$@"; do
    if [ "$previous" = -f ] && [ -f "$argument" ]; then
        sed -i -e 's/^    bind :/    bind 127.0.0.1:/' -e 's/^  bind \*:/  bind 127.0.0.1:/' \
            -e 's/ mode 666 level admin/ mode 600 level admin/' "$argument"
    fi
    previous=$argument
done
exec "$CIFAR_HAPROXY" "$@"
