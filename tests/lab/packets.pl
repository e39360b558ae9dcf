# Prints each TCP packet that passes an interface of this network namespace:
#
#     TIME INTERFACE in|out SOURCE DESTINATION FLAGS
#
# It stands in for tcpdump, which wants to become another user, and can't where
# a user namespace has but one. packet(7) tells what a packet socket gives.
use strict;
use warnings;
use Socket;

my ($AF_PACKET, $ETH_P_ALL, $PACKET_OUTGOING) = (17, 0x0003, 4);
my ($SIOCGSTAMPNS, $SIOCGIFNAME) = (0x8907, 0x8910);

socket(my $socket, $AF_PACKET, SOCK_DGRAM, unpack('S', pack('n', $ETH_P_ALL)))
  or die "packet socket: $!\n";
# The kernel keeps the time of packets as soon as somebody asks for it.
ioctl($socket, $SIOCGSTAMPNS, my $none = pack('q q', 0, 0));
$| = 1;    # each line at once
print "ready\n";

while (defined(my $from = recv($socket, my $packet, 65535, 0))) {
    my ($protocol, $index, $type) = unpack('x2 n i x2 C', $from);
    my ($head, $isTCP) = unpack('C x8 C', $packet);
    next unless $protocol == 0x0800 && $isTCP == 6;

    # When the packet came, not when perl gets around to reading it.
    ioctl($socket, $SIOCGSTAMPNS, my $stamp = pack('q q', 0, 0));
    my $time = sprintf('%d.%09d', unpack('q q', $stamp));
    ioctl($socket, $SIOCGIFNAME, my $request = pack('x16 i x20', $index));
    my $interface = unpack('Z16', $request);
    my $way = $type == $PACKET_OUTGOING ? 'out' : 'in';

    my ($source, $destination) = unpack('x12 a4 a4', $packet);
    my $tcp = substr($packet, ($head & 0x0f) * 4);
    my ($sourcePort, $destinationPort, $bits) = unpack('n n x9 C', $tcp);
    my %flag = (1 => 'F', 2 => 'S', 4 => 'R', 8 => 'P', 16 => '.');
    my $flags = join('', map { $bits & $_ ? $flag{$_} : '' } 1, 2, 4, 8, 16);
    print join(' ',
        $time, $interface, $way,
        inet_ntoa($source) . ".$sourcePort",
        inet_ntoa($destination) . ".$destinationPort", $flags), "\n";
}
