#!/bin/sh
# Makes a minimal Debian by debootstrap, which lies unpacked in a folder:
#
#     unshare --mount --pid --fork --kill-child \
#       sh make.sh DEBOOTSTRAP RELEASE MIRROR FOLDER
#
# What debootstrap mounts ends with it.
set -e
debootstrap=$1 release=$2 mirror=$3 folder=$4
mount --make-rprivate /

# It downloads by wget. apt does as well, is on every Debian, and knows the
# machine's proxies.
mkdir -p "$debootstrap/path"
cat > "$debootstrap/path/wget" << 'END'
#!/bin/sh
for url; do :; done
while [ "$1" != -O ]; do shift; done
exec /usr/lib/apt/apt-helper -q -o APT::Sandbox::User=root \
  download-file "$url" "$2" > /dev/null
END
chmod +x "$debootstrap/path/wget"
export PATH="$debootstrap/path:$PATH:/usr/sbin:/sbin"
export DEBOOTSTRAP_DIR="$debootstrap/usr/share/debootstrap"

# All of today's releases are made as sid is, also those that this debootstrap
# hasn't heard of.
timeout -k 9 1200 sh "$debootstrap/usr/sbin/debootstrap" --variant=minbase \
  "$release" "$folder" "$mirror" "$DEBOOTSTRAP_DIR/scripts/sid" 2>&1
# Its apt reaches the mirror as the machine's does: proxies, and whether an old
# copy will do.
apt-config dump | grep -E '^Acquire::(https?|Retries|Check-Valid-Until)' \
  > "$folder/etc/apt/apt.conf.d/machine" || :
