//go:build tools

// Names the command, so that go.mod and go.sum pin what it is built from. It is never compiled.
package tools

import _ "github.com/pulumi/pulumi/pkg/v3/cmd/pulumi"
