// The peer in Go: os/exec. Usage and output are those of posix_spawn.c.
package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

func once(capture bool, command []string) {
	child := exec.Command(command[0], command[1:]...)
	child.Stdin, child.Stdout, child.Stderr = os.Stdin, os.Stdout, os.Stderr
	var output bytes.Buffer
	if capture {
		child.Stdout = &output
	}
	if err := child.Run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func rate(level int, seconds float64, capture bool, command []string) float64 {
	var done int64
	var workers sync.WaitGroup
	begin := time.Now()
	for i := 0; i < level; i++ {
		workers.Add(1)
		go func() {
			defer workers.Done()
			for {
				once(capture, command)
				atomic.AddInt64(&done, 1)
				if time.Since(begin).Seconds() >= seconds {
					return
				}
			}
		}()
	}
	workers.Wait()
	return float64(done) / time.Since(begin).Seconds()
}

func main() {
	capture := os.Args[1] == "capture"
	seconds, err := strconv.ParseFloat(os.Args[2], 64)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	var found []string
	for _, level := range strings.Split(os.Args[3], ",") {
		atOnce, err := strconv.Atoi(level)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
		rate(atOnce, seconds/10, capture, os.Args[4:])
		found = append(found, fmt.Sprintf("%q: %.2f", level, rate(atOnce, seconds, capture, os.Args[4:])))
	}
	fmt.Printf("{%s}\n", strings.Join(found, ", "))
}
