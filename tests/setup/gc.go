// gc has libcni collect the garbage of a network, as a runtime does: cnitool
// cannot name the attachments that are to stay.
//
//	gc NETWORK '[{"containerID": "…", "ifname": "eth0"}]'
package main

import (
	"context"
	"encoding/json"
	"log"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/libcni"
)

func main() {
	list, err := libcni.LoadConfList("/etc/cni/net.d", os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	args := &libcni.GCArgs{}
	err = json.Unmarshal([]byte(os.Args[2]), &args.ValidAttachments)
	if err != nil {
		log.Fatal(err)
	}
	path := filepath.SplitList(os.Getenv("CNI_PATH"))
	cni := libcni.NewCNIConfig(path, nil)
	if err = cni.GCNetworkList(context.Background(), list, args); err != nil {
		log.Fatal(err)
	}
}
